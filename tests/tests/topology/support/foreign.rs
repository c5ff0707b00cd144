//! An XDP program that is not slb's.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use slb_lab::Netns;

use super::output;

/// Passes every packet; dropping it unloads it, once it is detached as well.
pub(crate) struct Foreign {
    fd: OwnedFd,
}

/// The part of the kernel's `union bpf_attr` that loads a program.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

impl Foreign {
    /// `name` has at most 15 bytes.
    pub(crate) fn load(name: &str) -> Self {
        const PROG_LOAD: libc::c_long = 5;
        const XDP: u32 = 6;
        // r0 = XDP_PASS; exit
        const INSTRUCTIONS: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];
        let license = CString::new("GPL").unwrap();
        let mut load = Load {
            prog_type: XDP,
            insn_cnt: 2,
            insns: INSTRUCTIONS.as_ptr() as u64,
            license: license.as_ptr() as u64,
            ..Load::default()
        };
        load.prog_name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: `load` and what it points to live until the call returns, and it is as long as
        // said.
        let fd =
            unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) };
        let fd = i32::try_from(fd).unwrap();
        assert!(fd >= 0, "loading {name}: {}", io::Error::last_os_error());
        // SAFETY: the kernel has just given it to us.
        Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } }
    }

    /// The kernel's number for it.
    pub(crate) fn id(&self) -> u32 {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = std::fs::read_to_string(path).unwrap();
        let id = text.lines().find_map(|line| line.strip_prefix("prog_id:")).unwrap();
        id.trim().parse().unwrap()
    }

    /// Attaches it, in the old way: not by a link.
    pub(crate) fn attach(&self, netns: &Netns, interface: &str) {
        let id = self.id().to_string();
        output(netns, "bpftool", &["net", "attach", "xdp", "id", &id, "dev", interface]);
    }
}
