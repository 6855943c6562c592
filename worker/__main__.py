"""
`python -m worker`: the same as the command `shiftworker`.
"""

from worker.cli import main

main()
