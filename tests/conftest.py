"""What holds for all tests: nothing is asked of a network, whichever library is imported first."""
import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
