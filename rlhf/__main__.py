"""`python -m rlhf` is the console script `rlhf`."""

from actors.job import main

if __name__ == "__main__":
    main()
