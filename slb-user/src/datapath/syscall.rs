//! Calls of `bpf()` that aya does not offer.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info, bpf_prog_info};

/// Pins the object of a descriptor.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = path.as_ptr().expose_provenance() as u64;
    attr.__bindgen_anon_4.bpf_fd = object.as_raw_fd() as u32;
    // SAFETY: the kernel reads a path that ends with 0.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens the object that is pinned at a path.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = path.as_ptr().expose_provenance() as u64;
    // SAFETY: the kernel reads a path that ends with 0.
    let fd = unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel has made this descriptor, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Where an XDP link is attached; 0: that interface is gone, or the link was detached.
pub(super) fn ifindex(link: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: integers, and unions of them, which may all be 0.
    let mut info: bpf_link_info = unsafe { mem::zeroed() };
    // SAFETY: `info` is what the kernel tells of a link, and leads nowhere.
    unsafe { object_info(link, &mut info) }?;
    // SAFETY: the link is one of XDP, and any bits are an integer.
    Ok(unsafe { info.__bindgen_anon_1.xdp.ifindex })
}

/// What the kernel knows of a program; the ids of its maps, as far as there is room.
pub(super) fn program_info(
    program: BorrowedFd<'_>,
    map_ids: &mut [u32],
) -> io::Result<bpf_prog_info> {
    // SAFETY: integers and arrays of them, which may all be 0.
    let mut info: bpf_prog_info = unsafe { mem::zeroed() };
    info.nr_map_ids = map_ids.len() as u32;
    info.map_ids = map_ids.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: `info` is what the kernel tells of a program, and there is room for as many ids as it says.
    unsafe { object_info(program, &mut info) }?;
    Ok(info)
}

/// # Safety
///
/// `T` is what the kernel tells of such an object, and what it points to has the length that it says.
unsafe fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = empty();
    attr.info.bpf_fd = object.as_raw_fd() as u32;
    attr.info.info_len = size_of::<T>() as u32;
    attr.info.info = ptr::from_mut(info).expose_provenance() as u64;
    // SAFETY: the kernel writes to `info` and what it points to only, as the caller promises.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.map(drop)
}

/// The id of the program in a slot of a program array; `None`: the slot is empty.
pub(super) fn program_in(map: BorrowedFd<'_>, slot: u32) -> io::Result<Option<u32>> {
    let mut program = 0_u32;
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_2.key = (&raw const slot).expose_provenance() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = (&raw mut program).expose_provenance() as u64;
    // SAFETY: key and value are as long as those of a program array, four bytes.
    match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(Some(program)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn empty() -> bpf_attr {
    // SAFETY: integers, and unions of them, which may all be 0.
    unsafe { mem::zeroed() }
}

/// # Safety
///
/// The addresses in `attr` are what the command says.
unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: as the caller promises.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<bpf_attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
