"""`python -m recursify JOB [flags]`."""

from .cli.main import main

if __name__ == "__main__":
    main()
