"""The doors of tc_lightning: python -m tc_lightning <verb> key=value ..."""

from tc_lightning.cli import main

if __name__ == "__main__":
    main()
