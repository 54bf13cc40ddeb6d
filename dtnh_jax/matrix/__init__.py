"""Does a regularizer ever hurt? Many small fine-tunings: `dtnh matrix`.

A grid of source, target, regularizer, strength, rule, optimizer and seed, on networks
small enough for two processor cores. Data flows one way: images -> sources, targets ->
rules -> training -> cells -> study -> report. Nothing here is needed to use the
library itself.
"""
