"""`python -m recursify JOB [flags]`."""

from .cli import main

if __name__ == "__main__":
    main()
