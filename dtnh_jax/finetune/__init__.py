"""Fine-tunes real pretrained networks on real photographs: the command `dtnh`.

Packages import only those before them: data, models, weights, training, runs, reports.
The options (`config`, `methods`) come before all of them, `command` after. Nothing here
is needed to use the library itself.
"""
