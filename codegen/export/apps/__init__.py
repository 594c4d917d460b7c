"""What comes with an export for a phone: the model as a module of an Android app, or as a package for an iOS one."""

from __future__ import annotations

from tersor.codegen.export.apps import android, swift
from tersor.codegen.export.apps.app import App

FOLDERS = {"android": "android", "ios": "swift"}
"""Where the files of a system's apps lie in an export."""

_WRITERS = {"android": android.files, "ios": swift.files}


def app_files(app: App, system: str) -> dict[str, str]:
    """The texts of an app's files by their place in the folder of an export; none but for Android and iOS."""
    return _WRITERS[system](app) if system in _WRITERS else {}
