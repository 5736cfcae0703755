"""The contracts: plug-ins, bricks, schedulers, their facade, and their JSON forms."""
