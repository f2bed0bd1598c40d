"""Step 3 of the quick start: generate text, once or interactively. The same as `recursify generate`."""

from recursify.cli.main import generate

if __name__ == "__main__":
    generate()
