"""`torchrun launch/train.py CONFIG ...` is `torchrun -m cclmpc_dist train CONFIG ...`, for whom a file suits better."""

import sys

from cclmpc_dist.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
