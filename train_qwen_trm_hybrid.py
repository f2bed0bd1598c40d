"""Approach 3 of the technical guide: train recursive layers between a donor's frozen embeddings and its frozen head."""

from recursify.cli.main import train_trm_hybrid

if __name__ == "__main__":
    train_trm_hybrid()
