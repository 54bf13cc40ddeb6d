"""Runs many trainings in one run folder, from which an interrupted run resumes."""
