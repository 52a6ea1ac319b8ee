"""One door to Slurm's commands: a runner, and pure parsers of what they print.

Text formats, not JSON: the text is the same from 22.05 to 25.x, the JSON is not. Slurm's words are
translated to ours here and nowhere else.
"""
