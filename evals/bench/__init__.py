"""The speed bench: operators, roofs of the machine and peers, interleaved in one run.

`points` says what is measured, `roofline` what the machine can do, `peers` who else is asked (one file each), `run`
measures and `report` shows. The command is ``torch-int4 bench``.
"""
