"""Fine-tunes real pretrained networks on real photographs: `python -m ...finetune`.

Data flows one way: config -> targets, data -> sources, models -> methods -> loop ->
experiment -> report. Nothing here is needed to use the library itself.
"""
