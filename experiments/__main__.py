"""Runs the commands of the application and of the paper: ``python -m experiments --help``."""

from jaxrobust.app import cli

_COMMANDS = "experiments.commands"

COMMANDS = {
    "reproduce": cli.Command(
        _COMMANDS, "Reproduce", "Make a table or figure of the paper, or run a recipe."),
    **cli.COMMANDS,
    "steps": cli.Command(
        f"{cli.MEASUREMENTS}.steps", "STEPS", "Study how Eq. 21 depends on its step."),
    "theory": cli.Command(
        f"{cli.MEASUREMENTS}.theory", "THEORY", "Check the paper's theorems on trained networks."),
    "sharpness": cli.Command(
        f"{cli.MEASUREMENTS}.sharpness", "SHARPNESS",
        "Measure how sharply the loss bends in the parameters."),
    "readme": cli.Command(_COMMANDS, "Readme", "Rewrite the tables of the README and docs."),
    "bench": cli.Command(_COMMANDS, "Bench", "Measure the library's speed and memory."),
}


def main() -> None:
    """Runs the command of the command line."""
    cli.main(COMMANDS, "python -m experiments")


if __name__ == "__main__":
    main()
