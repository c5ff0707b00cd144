//! Calls of `bpf()` that aya does not offer.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info};

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
    let mut attr = empty();
    attr.info.bpf_fd = link.as_raw_fd() as u32;
    attr.info.info_len = size_of_val(&info) as u32;
    attr.info.info = (&raw mut info).expose_provenance() as u64;
    // SAFETY: the kernel writes to `info` only, and not past the length that it is given.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    // SAFETY: the link is one of XDP, and any bits are an integer.
    Ok(unsafe { info.__bindgen_anon_1.xdp.ifindex })
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
