"""Does trust keep a regularizer's help without its harm? The study `dtnh study`.

Every method is trained with every value of its own number, on folds of the training set
and on all of it. Choosing a value is arithmetic on that table (`choice`), so each rival
is tuned as its users would, and what a choice costs is known.

Data flows from images to sources and tasks, methods, training, cells, choice, report.
"""
