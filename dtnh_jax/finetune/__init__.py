"""The command `dtnh`: fine-tunes pretrained networks on photographs.

Each package imports only earlier ones of data, models, weights, training, runs and
reports. The options (`config`, `methods`) come before all of them, `command` after. The
library itself does not use this package.
"""
