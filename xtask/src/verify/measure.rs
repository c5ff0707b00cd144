//! What a program costs: counted in the object, and told by the kernel that loads it.
//!
//! aya loads the program wherever it is used. Here its parts are called one by one, because aya drops
//! the log of a verifier that had nothing to object to, and only that log tells the stack.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::CStr,
    io, mem,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::MapData;
use aya_obj::{
    Function, Object, ProgramSection,
    generated::{BPF_CALL, BPF_JMP, BPF_PSEUDO_CALL, BPF_PSEUDO_FUNC, bpf_attr, bpf_cmd, bpf_insn},
    generated::{bpf_attach_type, bpf_prog_info, bpf_prog_type},
};
use serde::{Deserialize, Serialize};

/// What a compiler calls for copies that it does not write out: loops, byte by byte.
const COPIES: [&str; 6] = ["memcpy", "memmove", "memset", "memcmp", "bcmp", "strlen"];
/// Entries per map; the program takes no other way for more.
const ENTRIES: u32 = 1024;
/// `BPF_LOG_STATS` of `linux/bpf_verifier.h`.
const LOG_STATS: u32 = 4;
const LOG_BYTES: usize = 1 << 20;
/// `MAX_BPF_STACK`, and the unit in which kernel 6.1 counts frames against it; newer ones count finer.
pub(super) const STACK_LIMIT: u32 = 512;
const STACK_UNIT: u32 = 32;
/// `MAX_CALL_FRAMES` of `linux/bpf_verifier.h`.
const CALL_FRAMES: usize = 8;

/// What was measured on one kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Series of the kernel, as in `6.1`.
    pub kernel: String,
    /// By the program's name.
    pub programs: BTreeMap<String, Program>,
}

/// A program with all subprograms that it can reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Program {
    /// In the object.
    pub instructions: u32,
    /// After the kernel has rewritten accesses and inlined its own functions.
    pub translated: u32,
    /// Machine code in bytes; depends on the processor as well.
    pub jited: u32,
    /// Instructions that the verifier walked through, of a million.
    pub verified: u32,
    /// Stack of the deepest chain of calls, in bytes.
    pub stack: u32,
    /// By the subprogram's name.
    pub subprograms: BTreeMap<String, Subprogram>,
}

/// One function that was not inlined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subprogram {
    /// Its own stack, in bytes.
    pub stack: u32,
    /// Calls to [`COPIES`]. None is allowed, so none is in the budget.
    #[serde(default, skip_serializing_if = "is_none")]
    pub copies: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
const fn is_none(copies: &u32) -> bool {
    *copies == 0
}

/// Loads every program of an object into the kernel, and lets go of it.
///
/// # Errors
///
/// The object is not one of ours, or the kernel refuses it.
pub(super) fn object(bytes: &[u8]) -> Result<Measured> {
    let mut object = Object::parse(bytes).context("parsing the object")?;
    let features = aya::features();
    let btf = object
        .fixup_and_sanitize_btf(features.btf().context("the kernel has no BTF")?)?
        .context("the object has no BTF")?
        .to_bytes();
    let btf = load_btf(&btf).context("the kernel refuses the object's BTF")?;
    let names: BTreeMap<u32, String> = object
        .functions
        .values()
        .filter_map(|function| {
            Some((function.func_info.func_info.first()?.type_id, readable(&function.name)))
        })
        .collect();

    let mut maps = Vec::new();
    for (name, mut map) in object.maps.drain() {
        map.set_max_entries(map.max_entries().min(ENTRIES));
        let made = MapData::create(map.clone(), &name, Some(btf.as_fd()))
            .with_context(|| format!("making map {name}"))?;
        maps.push((name, made.fd().as_fd().try_clone_to_owned()?, map));
    }
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_maps(
        maps.iter().map(|(name, fd, map)| (name.as_str(), fd.as_raw_fd(), map)),
        &sections,
    )?;
    object.relocate_calls(&sections)?;
    object.sanitize_functions(features);

    let mut programs = BTreeMap::new();
    for (name, program) in &object.programs {
        let ProgramSection::Xdp { .. } = program.section else {
            bail!("program {name} is not XDP; {} has to learn its kind", file!());
        };
        let function = &object.functions[&program.function_key()];
        let measured = linked(function, &names)
            .and_then(|linked| linked.measure(function, &program.license, &btf))
            .with_context(|| format!("program {name}"))?;
        programs.insert(name.clone(), measured);
    }
    Ok(Measured { kernel: kernel()?, programs })
}

/// `6.1` of `6.1.0-56-amd64`.
fn kernel() -> Result<String> {
    let release = nix::sys::utsname::uname()?.release().display().to_string();
    let series: Vec<_> = release.split(['.', '-']).take(2).collect();
    Ok(series.join("."))
}

/// `slb::neigh::claim` of `_RNvNtCs8VmfBYvmLqh_3slb5neigh5claim`.
fn readable(symbol: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(symbol))
}

/// A program and its subprograms, in the order in which they follow each other.
#[derive(Debug, PartialEq, Eq)]
struct Linked {
    instructions: u32,
    names: Vec<String>,
    /// Caller and callee of each call, once per place, as indices into `names`.
    calls: Vec<(usize, usize)>,
}

fn linked(function: &Function, names: &BTreeMap<u32, String>) -> Result<Linked> {
    let mut starts = Vec::new();
    let mut found = Vec::new();
    for info in &function.func_info.func_info {
        let name = names.get(&info.type_id).context("BTF names a function without a symbol")?;
        starts.push(usize::try_from(info.insn_off)?);
        found.push(name.clone());
    }
    let targets = targets(&function.instructions);
    // Else some call would go to a function without a name.
    let called: BTreeSet<usize> = targets.iter().map(|(_, to)| *to).chain([0]).collect();
    if !starts.is_sorted() || called != starts.iter().copied().collect() {
        bail!("calls go to {called:?}, but BTF knows functions at {starts:?}");
    }
    let owner = |at: usize| starts.partition_point(|&start| start <= at) - 1;
    Ok(Linked {
        instructions: u32::try_from(function.instructions.len())?,
        names: found,
        calls: targets.into_iter().map(|(from, to)| (owner(from), owner(to))).collect(),
    })
}

/// Every instruction that calls or refers to a subprogram, and where that begins.
fn targets(instructions: &[bpf_insn]) -> Vec<(usize, usize)> {
    let call = u8::try_from(BPF_JMP | BPF_CALL).expect("one byte of an instruction");
    instructions
        .iter()
        .enumerate()
        .filter(|(_, instruction)| match u32::from(instruction.src_reg()) {
            BPF_PSEUDO_CALL => instruction.code == call,
            // The only other that has this register: a load of a function's address.
            BPF_PSEUDO_FUNC => instruction.code == 0x18,
            _ => false,
        })
        .filter_map(|(at, instruction)| {
            // Counted from the next instruction. The kernel refuses what leads out of the program.
            let to = (at + 1).checked_add_signed(isize::try_from(instruction.imm).ok()?)?;
            Some((at, to))
        })
        .collect()
}

impl Linked {
    fn measure(&self, function: &Function, license: &CStr, btf: &OwnedFd) -> Result<Program> {
        let (program, log) = load_program(function, license, btf)?;
        let stacks = stacks(&log).filter(|stacks| stacks.len() == self.names.len());
        let program = match (program, &stacks) {
            (Ok(program), _) => program,
            (Err(error), None) => {
                bail!("the kernel refuses it: {error}; its verifier says:\n{log}")
            }
            (Err(error), Some(stacks)) => bail!(
                "the kernel refuses it: {error}; its verifier says:\n{log}\
                 deepest chain of calls, with its stack: {}",
                self.chain(stacks)
            ),
        };
        let stacks = stacks.with_context(|| {
            format!("no stacks of {} functions in the log:\n{log}", self.names.len())
        })?;
        let info = info(&program)?;
        let mut subprograms: BTreeMap<String, Subprogram> = BTreeMap::new();
        for (index, (name, &stack)) in self.names.iter().zip(&stacks).enumerate() {
            // Instances of a generic function share a name, and so a line.
            let subprogram = subprograms.entry(name.clone()).or_default();
            subprogram.stack = subprogram.stack.max(stack);
            subprogram.copies += self.copies(index);
        }
        Ok(Program {
            instructions: self.instructions,
            translated: info.xlated_prog_len / u32::try_from(size_of::<bpf_insn>())?,
            jited: info.jited_prog_len,
            verified: info.verified_insns,
            stack: self.deepest(0, &stacks, CALL_FRAMES).0,
            subprograms,
        })
    }

    /// Calls to [`COPIES`] from a function; their own calls to each other are counted where they begin.
    fn copies(&self, function: usize) -> u32 {
        let copies = |index: usize| COPIES.contains(&self.names[index].as_str());
        if copies(function) {
            return 0;
        }
        let calls = self.calls.iter().filter(|&&(from, to)| from == function && copies(to));
        u32::try_from(calls.count()).expect("fewer calls than instructions")
    }

    /// Stack of the deepest chain of calls that begins with a function, and the functions in it.
    /// Not longer than `frames`, else it would not end where a function calls itself.
    fn deepest(&self, function: usize, stacks: &[u32], frames: usize) -> (u32, Vec<usize>) {
        if frames == 0 {
            return (0, Vec::new());
        }
        let callees: BTreeSet<usize> =
            self.calls.iter().filter(|(from, _)| *from == function).map(|(_, to)| *to).collect();
        let below =
            callees.into_iter().map(|callee| self.deepest(callee, stacks, frames - 1)).max();
        let (depth, functions) = below.unwrap_or_default();
        let own = stacks[function].max(1).next_multiple_of(STACK_UNIT);
        (own + depth, [vec![function], functions].concat())
    }

    /// The deepest chain, in words.
    fn chain(&self, stacks: &[u32]) -> String {
        let (sum, functions) = self.deepest(0, stacks, CALL_FRAMES);
        let frames: Vec<_> = functions
            .into_iter()
            .map(|function| format!("{} {}", self.names[function], stacks[function]))
            .collect();
        format!("{}; {sum} of {STACK_LIMIT} in units of {STACK_UNIT}", frames.join(" -> "))
    }
}

/// Of a line like `stack depth 264+120+48`.
fn stacks(log: &str) -> Option<Vec<u32>> {
    let line = log.lines().find_map(|line| line.strip_prefix("stack depth "))?;
    line.trim().split('+').map(|depth| depth.parse().ok()).collect()
}

fn load_btf(bytes: &[u8]) -> Result<OwnedFd> {
    let mut attr = attr();
    // SAFETY: any bytes are valid in each of the union's members.
    let load = unsafe { &mut attr.__bindgen_anon_7 };
    load.btf = address(bytes);
    load.btf_size = length(bytes)?;
    // SAFETY: `btf` outlives the call, which returns a descriptor of ours.
    unsafe { new_fd(bpf_cmd::BPF_BTF_LOAD, &mut attr) }.map_err(Into::into)
}

/// Gives the verifier's log in both cases.
fn load_program(
    function: &Function,
    license: &CStr,
    btf: &OwnedFd,
) -> Result<(io::Result<OwnedFd>, String)> {
    let functions = function.func_info.func_info_bytes();
    let lines = function.line_info.line_info_bytes();
    let mut log = vec![0_u8; LOG_BYTES];
    let mut attr = attr();
    // SAFETY: as above.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_XDP as u32;
    load.expected_attach_type = bpf_attach_type::BPF_XDP as u32;
    load.insns = address(&function.instructions);
    load.insn_cnt = u32::try_from(function.instructions.len())?;
    load.license = address(license.to_bytes_with_nul());
    load.prog_btf_fd = u32::try_from(btf.as_raw_fd())?;
    load.func_info = address(&functions);
    load.func_info_cnt = u32::try_from(function.func_info.len())?;
    load.func_info_rec_size = u32::try_from(function.func_info_rec_size)?;
    load.line_info = address(&lines);
    load.line_info_cnt = u32::try_from(function.line_info.len())?;
    load.line_info_rec_size = u32::try_from(function.line_info_rec_size)?;
    load.log_level = LOG_STATS;
    load.log_buf = log.as_mut_ptr().addr() as u64;
    load.log_size = length(&log)?;
    // SAFETY: what it points to outlives the call, which returns a descriptor of ours.
    let loaded = unsafe { new_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr) };
    let text = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
    Ok((loaded, text))
}

fn info(program: &OwnedFd) -> Result<bpf_prog_info> {
    // SAFETY: plain numbers and addresses, none of which the kernel follows when it is 0.
    let mut info: bpf_prog_info = unsafe { mem::zeroed() };
    let mut attr = attr();
    attr.info.bpf_fd = u32::try_from(program.as_raw_fd())?;
    attr.info.info_len = u32::try_from(size_of_val(&info))?;
    attr.info.info = (&raw mut info).addr() as u64;
    // SAFETY: `info` is as long as was said.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.context("asking about it")?;
    Ok(info)
}

fn attr() -> bpf_attr {
    // SAFETY: a union of plain numbers and addresses; the kernel wants zeros where nothing is said.
    unsafe { mem::zeroed() }
}

fn address<T>(of: &[T]) -> u64 {
    of.as_ptr().addr() as u64
}

fn length(of: &[u8]) -> Result<u32> {
    Ok(u32::try_from(of.len())?)
}

/// # Safety
///
/// As [`bpf`], and the command has to return a descriptor.
unsafe fn new_fd(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: the caller's.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the command has made it for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
///
/// Addresses in `attr` have to be valid for what the command does with them.
unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: the caller's.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as i32, &raw mut *attr, size_of::<bpf_attr>())
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linked() -> Linked {
        let names = ["slb", "slb::far", "slb::near", "memset", "memcpy"].map(str::to_owned).into();
        Linked { instructions: 9, names, calls: vec![(0, 1), (0, 2), (1, 3), (1, 3), (3, 4)] }
    }

    #[test]
    fn given_calls_when_copies_are_counted_then_each_place_outside_of_them_counts() {
        let copies: Vec<_> = (0..5).map(|function| linked().copies(function)).collect();
        assert_eq!(copies, [0, 2, 0, 0, 0]);
    }

    #[test]
    fn given_calls_when_the_stack_is_summed_then_the_deepest_chain_counts_in_whole_units() {
        let linked = linked();
        assert_eq!(
            linked.deepest(0, &[264, 8, 90, 0, 40], CALL_FRAMES),
            (288 + 32 + 32 + 64, vec![0, 1, 3, 4])
        );
        assert_eq!(linked.deepest(0, &[264, 8, 400, 0, 0], CALL_FRAMES), (288 + 416, vec![0, 2]));
        let recursive = Linked { calls: vec![(0, 0)], ..self::linked() };
        assert_eq!(recursive.deepest(0, &[32; 5], CALL_FRAMES).0, 8 * 32);
        let words = "slb 264 -> slb::near 400; 704 of 512 in units of 32";
        assert_eq!(linked.chain(&[264, 8, 400, 0, 0]), words);
    }

    #[test]
    fn given_instructions_when_calls_are_sought_then_only_those_to_subprograms_are_found() {
        let instruction = |code: u8, register: u8, imm: i32| {
            let mut instruction: bpf_insn = zero();
            instruction.code = code;
            instruction.set_src_reg(register);
            instruction.imm = imm;
            instruction
        };
        let helper = instruction(0x85, 0, 1);
        let map = instruction(0x18, 1, 5);
        let forwards = instruction(0x85, 1, 2);
        let backwards = instruction(0x85, 1, -4);
        let reference = instruction(0x18, 4, 0);
        let all = [helper, map, forwards, backwards, reference, helper];
        assert_eq!(targets(&all), [(2, 5), (3, 0), (4, 5)]);
    }

    fn zero() -> bpf_insn {
        // SAFETY: an instruction of zeros is one.
        unsafe { mem::zeroed() }
    }

    #[test]
    fn given_a_log_when_it_is_read_then_every_stack_is_found() {
        let log = "verification time 900 usec\nstack depth 264+120+0\nprocessed 1 insns\n";
        assert_eq!(stacks(log), Some(vec![264, 120, 0]));
        assert_eq!(stacks("stack depth none"), None);
        assert_eq!(stacks(""), None);
    }
}
