"""Measures how much help and harm `never_hurt` and its rivals keep: `dtnh study`.

Every method is trained with every value of its own hyperparameter, on folds of the
training set and on all of it. Choosing a value is arithmetic on that table (`choice`):
each rival is tuned as its users would tune it, and the cost of tuning is counted.

Data flows from images to sources and tasks, methods, training, cells, choice, report.
"""
