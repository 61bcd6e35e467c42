from latticode.cli.main import main

main()
