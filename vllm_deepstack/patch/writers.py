"""Who else can write to a tree."""

from __future__ import annotations

import grp
import pwd
import stat
from collections.abc import Iterable
from pathlib import Path

from ..cli import UserError


def refuse_writers(root: Path, paths: Iterable[str]) -> None:
    """For root, before it writes to files in a tree: all folders from the tree's root to each of
    them have one owner and no other writer.

    Whoever can write to one of these folders can put a link there after links were looked for, and
    so lead root to write elsewhere. A sticky bit does not help: it lets everybody add names. A
    group may write if it is root's, or if the system knows it and nobody else is in it: Debian
    gives /usr/local to `staff`, which is empty, and a user's own group has no other member.

    Raises:
        UserError: somebody else can write to a folder.
    """
    owner = root.stat().st_uid
    folders = {folder for path in paths for folder in (root / path).parents}
    for folder in sorted(folders - {*root.parents}):
        if not folder.exists():
            continue
        found = folder.stat()
        shared = found.st_mode & stat.S_IWGRP and has_others(found.st_gid, owner)
        if found.st_uid != owner or found.st_mode & stat.S_IWOTH or shared:
            raise UserError(
                f"{folder}: its owner is {found.st_uid}:{found.st_gid}, its mode "
                f"{stat.S_IMODE(found.st_mode):o}, and the owner of {root} is {owner}: root does "
                "not write where others can, who could lead it elsewhere. Give the tree one owner "
                "(chown -R) and no other writer (chmod -R go-w), or run this as another user"
            )


def has_others(group: int, owner: int) -> bool:
    """Whether a group has, or may have, members other than root and the owner."""
    if group == 0:
        return False
    try:
        members = {*grp.getgrgid(group).gr_mem}
    except KeyError:  # a container's processes may be in groups that have no name there
        return True
    users = pwd.getpwall()
    members |= {user.pw_name for user in users if user.pw_gid == group}
    return bool(members - {user.pw_name for user in users if user.pw_uid in (0, owner)})
