"""Approach 1 of the technical guide: train a recursive block in a donor's embedding space. The model cannot generate text."""

from recursify.cli.main import train_trm

if __name__ == "__main__":
    train_trm()
