"""``python -m gradxform``: the command ``gradxform``."""

from gradxform.lab.__main__ import main

if __name__ == "__main__":
    main()
