"""``python -m mpjax``: see `mpjax.cli`."""

from mpjax.cli import program

if __name__ == "__main__":
  program()
