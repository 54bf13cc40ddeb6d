"""Does a regularizer ever hurt? Many small fine-tunings: `dtnh matrix`.

A grid of source, target, regularizer, strength, rule, optimizer and seed, on networks
small enough for two processor cores. The options (`config`) and what there is to choose
from (`catalogue`) are data; it flows from images to sources and targets, rules,
training, study and report.
"""
