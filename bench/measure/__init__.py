"""How it is timed, counted and stored; what a card reaches at best."""
