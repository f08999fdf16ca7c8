"`python -m bantam` is `bantam-cli`."
from bantam.cli import main

main()
