"""`python -m tools.docs`: writes the generated parts of docs/ anew, from the configuration models and the commands."""

from tools.docs.generated import GENERATED, current_text


def main() -> None:
    for page in GENERATED:
        text = current_text(page)
        if text != page.read_text():
            page.write_text(text)
            print(f"{page.name} is new")


main()
