"""Evaluation of trained models: the NLL of every row of a split, the other measures, and the report.

Results are kept block by block on disk, so that an interrupted evaluation resumes. Work is spread over Ray actors.
May be imported by `platform.train`, `platform.tune`, `platform.serve` and the command line.
"""
