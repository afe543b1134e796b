"""The baseline of a method on one real model: a table with a row a model and every figure of quality in a column.

Reading order: `table_rows` (what is measured), `columns` (how), `question_files` and `cache_reading` (by what means),
`baseline_run` (all of it, resumable). Then what is made of `finished_rows`: `markdown_table`, `side_by_side` (old and new),
`against_quantised` (widths against fewer bits), `pictures` and their `label_places`.
"""
