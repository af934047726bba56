"""The commands of ``torch-int4``: one file per command, found by its name.

A file ``lm_eval.py`` here becomes the command ``lm-eval``; its function ``main`` is a typer command, whose
docstring is the help text; `CONTEXT`, if there is one, has click's settings. Import transformers and whatever else is
slow inside ``main``, never at the top: every file here is imported for ``torch-int4 --help``.
"""
