"""`python -m cclmpc_dist` is `cclmpc`; launchers that take a module start it this way."""

from cclmpc_dist.cli import main

if __name__ == "__main__":
    main()
