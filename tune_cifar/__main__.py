"""`python -m tune_cifar`."""

from tune_cifar.cli import main

if __name__ == "__main__":
    main()
