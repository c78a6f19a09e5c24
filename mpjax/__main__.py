"""``python -m mpjax``: see `mpjax.cli`."""

from mpjax.cli import main

if __name__ == "__main__":
  raise SystemExit(main())
