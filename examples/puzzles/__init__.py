"""ARC, mazes and Sudoku with the classic TRM: `PYTHONPATH=examples python -m puzzles`; docs/classic-trm.md"""
