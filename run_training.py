"""Trains with this checkout's code and configuration: python run_training.py model=gemma3_1b data.train=chats.jsonl"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from adaptax.cli import main

if __name__ == "__main__":
    main()
