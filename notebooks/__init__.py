"""One paper, one notebook: NAME.py in percent format, NAME.ipynb beside it, executed."""
