"""What tests of pages share: the sources of the book to build elsewhere, and what a browser asked for."""

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks")


def copy_sources(folder):
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("executed", "_build"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def voila_errors(driver):
    """Errors in the log of the browser, without the kernel's of a page that loaded slowly and was asked for anew."""
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in severe if "/voila/api/shutdown/" not in message]


def asked_for(driver):
    """Addresses that the page has asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
