"""`python -m raise_env.agents`: the same as `raise-env`."""

from .cli import main

if __name__ == "__main__":
    main()
