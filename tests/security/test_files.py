"""What data files and checkpoints name is looked up below their folder, also when links are in the way."""

from __future__ import annotations

import pickle

import pytest
from PIL import Image

from dsvl2_jax.errors import SampleError
from dsvl2_jax.inputs.image_sources import FolderImages, open_images


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures with links in it: some lead within it, some out of it."""
    root, store = tmp_path / "images", tmp_path / "store"
    (root / "sub").mkdir(parents=True)
    store.mkdir()
    for file in (root / "a.png", root / "sub" / "b.png", store / "c.png"):
        Image.new("RGB", (4, 4)).save(file)
    (root / "inside.png").symlink_to("sub/b.png")
    (root / "folder").symlink_to(root / "sub")
    (root / "out.png").symlink_to(store / "c.png")
    (root / "store").symlink_to("../store")
    (root / "two.png").symlink_to("out.png")
    (root / "loop.png").symlink_to("loop.png")
    return root


@pytest.mark.parametrize("name", ["out.png", "store/c.png", "two.png", "sub/../store/c.png"])
def test_links_are_resolved_before_a_read_below_a_root(folder, name):
    with pytest.raises(SampleError, match=r"leads out of the image folder .*images, to .*store/c.png\. .*follow_links"):
        FolderImages(str(folder)).find(name)
    assert open_images(str(folder), "", follow_links=True).find(name) == str(folder / name.replace("sub/../", ""))


def test_links_within_the_root_are_as_good_as_files(folder):
    store = FolderImages(str(folder))
    assert store.find("inside.png") == store.find("folder/b.png") == str(folder / "sub" / "b.png")
    assert store.find(str(folder / "a.png")) == str(folder / "a.png")


def test_the_root_may_be_a_link_itself(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    for store in (FolderImages(str(link)), pickle.loads(pickle.dumps(FolderImages(str(link))))):
        assert store.find("a.png") == store.find(str(link / "a.png")) == str(folder / "a.png")
        with pytest.raises(SampleError, match="leads out"):
            store.find("out.png")


@pytest.mark.parametrize("follow_links", [False, True])
@pytest.mark.parametrize("name", ["../store/c.png", "/etc/passwd", "sub/../../store/c.png"])
def test_names_that_lead_out_are_refused_whether_links_are_followed_or_not(folder, name, follow_links):
    with pytest.raises(SampleError, match="outside of the image folder"):
        FolderImages(str(folder), follow_links).find(name)


@pytest.mark.parametrize("name", ["loop.png", "nothing.png", "a.png/b", "sub", "a\0.png", "\udc80.png", "x" * 5000])
def test_what_is_no_file_is_missing(folder, name):
    with pytest.raises(SampleError, match="no such file"):
        FolderImages(str(folder)).find(name)
