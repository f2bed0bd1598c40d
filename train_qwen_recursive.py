"""Step 2 of the quick start: fine-tune a recursive model. The same as `recursify train`."""

from recursify.cli.main import train

if __name__ == "__main__":
    train()
