//! Changes to eBPF objects.

use anyhow::{Context as _, Result};
use object::{Object as _, ObjectSection as _};

/// The object with one instruction written in another way, so that it does the same and yet is
/// another program to the kernel.
///
/// `r = imm` on 64 bits and on 32 bits, which clears the upper half, are the same for an `imm` that
/// is not negative.
///
/// # Errors
///
/// It is not an object with the agent's XDP program, or that has no such instruction.
pub fn another_build(object: &[u8]) -> Result<Vec<u8>> {
    const MOV64: u8 = 0xb7;
    const MOV32: u8 = 0xb4;
    const LOAD64: u8 = 0x18;
    let file = object::File::parse(object).context("an ELF file")?;
    let section = file.section_by_name("xdp.frags").context("no section of XDP programs")?;
    let (offset, _) = section.file_range().context("a section without content")?;
    let mut at = usize::try_from(offset).context("a section outside of the file")?;
    let mut changed = object.to_vec();
    loop {
        let instruction = object.get(at..at + 8).context("no instruction that can be changed")?;
        let offset_is_0 = instruction[2..4] == [0, 0];
        let imm_is_positive = instruction[7] < 0x80;
        match instruction[0] {
            code @ (MOV64 | MOV32) if offset_is_0 && imm_is_positive => {
                changed[at] = MOV64 ^ MOV32 ^ code;
                return Ok(changed);
            }
            LOAD64 => at += 16,
            _ => at += 8,
        }
    }
}
