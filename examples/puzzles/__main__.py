"""`PYTHONPATH=examples python -m puzzles`"""

from puzzles.command import main

if __name__ == "__main__":
    main()
