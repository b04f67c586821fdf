"""python -m plprune"""

from plprune.cli import main

main()
