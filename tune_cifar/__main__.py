"""`python -m tune_cifar`."""

from tune_cifar.cli.app import main

if __name__ == "__main__":
    main()
