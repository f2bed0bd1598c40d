"""`python -m recursify COMMAND [flags]`."""

from .cli.main import main

if __name__ == "__main__":
    main()
