//! `supernode forecast`.

mod model;
mod page;
mod print;

pub(super) use model::{Model, On};

use super::output::print_text;
use supernode::cluster::Machine;
use supernode::forecast::{AXES, ContextParallel, Phase, Pipeline, Recompute, Setting};
use supernode::mesh::Mesh;
use supernode::{Error, ErrorKind, Result};

/// Arguments of `supernode forecast`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    on: On,
    #[command(flatten)]
    model: Model,
    /// Chips along dp, fsdp, tp, cp, pp and ep, in any order; their product is the number of chips
    #[arg(long, value_name = "tp=8,pp=16,dp=64")]
    mesh: String,
    /// Chips in all. If --mesh multiplies to ep times as many, its ep lies inside dp, as Megatron counts
    #[arg(long, value_name = "N")]
    chips: Option<usize>,
    /// Placement of the axes, outermost first: neighbours lie along the last one
    #[arg(long, default_value = "pp,dp,fsdp,ep,cp,tp", value_name = "AXIS,..")]
    order: String,
    /// What is priced: a training step, prompts read into a cache, or a step that gives every sequence its next token
    #[arg(long, default_value = "train", value_parser = ["train", "prefill", "decode"])]
    mode: String,
    /// Sequences of a step; of inference, those in flight
    #[arg(long, value_name = "N")]
    global_batch: usize,
    /// Sequences that a chip computes at a time; by default 1; in decoding all that it has, and half of them where
    /// experts are split
    #[arg(long, value_name = "N")]
    micro_batch: Option<usize>,
    /// Further tokens that a step of decoding verifies
    #[arg(long, default_value_t = 0, value_name = "N")]
    speculated: usize,
    /// How many of them hold
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    accepted: f64,
    /// Tokens of a sequence: of a prompt, or in the cache; by default the model's
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Order of forwards and backwards
    #[arg(long, default_value = "1f1b", value_parser = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe"])]
    schedule: String,
    /// Chunks of layers on a stage; by default 1, and 2 for interleaved, zb-v and dualpipe
    #[arg(long, value_name = "N")]
    virtual_stages: Option<usize>,
    /// What is computed again instead of kept: none, selective (the core of unfused attention; with latent attention norms and
    /// up-projections; see stack.recompute_*) or full
    #[arg(long, default_value = "none", value_parser = ["none", "selective", "full"])]
    recompute: String,
    /// What is split over the chips with other sequences: 1 optimizer, 2 gradients too, 3 parameters too
    #[arg(long, default_value_t = 0, value_name = "0..3")]
    zero: u8,
    /// Split norms and dropout over tp
    #[arg(long)]
    sequence_parallel: bool,
    /// With --sequence-parallel: multiply chunk by chunk while the next tokens, or sums, travel over tp
    #[arg(long)]
    collective_matmul: bool,
    /// How attention meets the tokens of other chips of cp; by default ring
    #[arg(long, value_parser = ["ring", "all-gather", "ulysses", "usp"])]
    cp_method: Option<String>,
    /// With --cp-method usp: neighbours that exchange heads; by default as many as cp and the heads allow
    #[arg(long, value_name = "N", requires = "cp_method")]
    cp_exchange: Option<usize>,
    /// Type of matmuls
    #[arg(long, default_value = "bf16", value_parser = ["f32", "bf16", "fp8", "int8", "fp4"])]
    dtype: String,
    /// Write the pipeline's timeline, for Perfetto or Chrome
    #[arg(long, value_name = "OUT.json")]
    trace: Option<std::path::PathBuf>,
    /// Write a page with timeline, breakdown and scaling, that opens without a network
    #[arg(long, value_name = "OUT.html")]
    html: Option<std::path::PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<()> {
    let machine = a.on.machine()?;
    let setting = a.setting()?;
    if let Some(phase) = a.phase()? {
        return a.serve(&setting, phase, &machine);
    }
    let forecast = setting.price(&machine)?;
    if let Some(path) = &a.trace {
        write(path, "the timeline", &forecast.chrome_trace().to_string())?;
    }
    if let Some(path) = &a.html {
        let text = page::page(a.model.name(), &setting, &machine, &forecast)?;
        write(path, "the page", &text)?;
    }
    if a.json {
        print_text(&format!(
            "{}\n",
            print::as_json(&setting, &machine, &forecast)?
        ));
    } else {
        print::table(a.model.name(), &setting, &machine, &forecast)?;
    }
    Ok(())
}

fn write(path: &std::path::Path, what: &str, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|e| {
        let why = format!("cannot write {what} to {}: {e}", path.display());
        Error::new(ErrorKind::Io, why)
    })
}

impl Arguments {
    /// The mesh in its placement.
    fn mesh(&self) -> Result<Mesh> {
        let asked = Mesh::parse(&self.mesh)?;
        let wrong = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        if let Some(axis) = asked.axes().iter().find(|a| !AXES.contains(&a.name())) {
            return wrong(format!(
                "--mesh {asked}: axis '{}' is not priced; {} are",
                axis.name(),
                AXES.join(", ")
            ));
        }
        for axis in asked.axes() {
            let why = "a forecast prices a mesh whose chips do the same";
            asked.refuse_shares(axis.name(), why)?;
        }
        let order: Vec<&str> = self.order.split(',').map(str::trim).collect();
        let known = |axis: &&str| order.iter().filter(|o| o == &axis).count() == 1;
        if order.len() != AXES.len() || !AXES.iter().all(known) {
            return wrong(format!(
                "--order {}: name each of {} once",
                self.order,
                AXES.join(", ")
            ));
        }
        let inside = self.expert_axis(&asked)?;
        let size = |axis: &str| match axis {
            "dp" => asked.size_of("dp") / inside,
            _ => asked.size_of(axis),
        };
        Ok(Mesh::new(order.iter().map(|axis| (*axis, size(axis)))))
    }

    fn phase(&self) -> Result<Option<Phase>> {
        if self.mode != "decode" && (self.speculated, self.accepted) != (0, 0.0) {
            let why = format!(
                "--speculated {} and --accepted {} belong to a step of decoding; give --mode decode",
                self.speculated, self.accepted
            );
            return Err(Error::new(ErrorKind::Input, why));
        }
        Ok(match self.mode.as_str() {
            "prefill" => Some(Phase::Prefill),
            "decode" => Some(Phase::Decode {
                speculated: self.speculated,
                accepted: self.accepted,
            }),
            _ => None,
        })
    }

    fn serve(&self, setting: &Setting, phase: Phase, machine: &Machine) -> Result<()> {
        let refused = [
            ("--trace shows", self.trace.is_some()),
            ("--html shows", self.html.is_some()),
            ("--schedule is of", self.schedule != "1f1b"),
            ("--virtual-stages is of", self.virtual_stages.is_some()),
            ("--recompute is of", self.recompute != "none"),
            ("--zero is of", self.zero != 0),
            ("--collective-matmul is of", self.collective_matmul),
        ];
        if let Some((name, _)) = refused.iter().find(|(_, given)| *given) {
            let why = format!(
                "{name} a training step; leave it out, or leave out --mode {}",
                self.mode
            );
            return Err(Error::new(ErrorKind::Input, why));
        }
        let served = setting.serve(phase, machine)?;
        let interval = setting.serve_interval(phase, machine)?;
        if self.json {
            let object = print::served_json(&self.mode, setting, machine, &served, interval);
            print_text(&format!("{object}\n"));
        } else {
            print::served(self.model.name(), setting, machine, &served, interval);
        }
        Ok(())
    }

    /// What `ep` takes of `dp`: nothing, unless --chips says that it lies inside.
    fn expert_axis(&self, asked: &Mesh) -> Result<usize> {
        let (all, ep, dp) = (asked.chips(), asked.size_of("ep"), asked.size_of("dp"));
        match self.chips {
            None => Ok(1),
            Some(chips) if chips == all => Ok(1),
            Some(chips) if chips * ep == all && dp.is_multiple_of(ep) => Ok(ep),
            Some(chips) => Err(Error::new(
                ErrorKind::Mesh,
                format!("--mesh {asked} has {all} chips, --chips says {chips}"),
            )),
        }
    }

    fn context_parallel(&self, mesh: &Mesh) -> Result<ContextParallel> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Input, why));
        let Some(word) = &self.cp_method else {
            return Ok(ContextParallel::Ring);
        };
        if mesh.size_of("cp") == 1 {
            return refuse(format!(
                "--cp-method {word} is how mesh axis cp splits a sequence, and --mesh {} has none; cp=2 would do",
                self.mesh
            ));
        }
        let exchange = self.cp_exchange;
        match (word.as_str(), exchange) {
            ("usp", _) => Ok(ContextParallel::Usp { exchange }),
            (_, Some(n)) => refuse(format!(
                "--cp-exchange {n} is for --cp-method usp, not {word}"
            )),
            ("all-gather", _) => Ok(ContextParallel::AllGather),
            ("ulysses", _) => Ok(ContextParallel::Ulysses),
            _ => Ok(ContextParallel::Ring),
        }
    }

    fn setting(&self) -> Result<Setting> {
        let model = self.model.architecture(&self.on)?;
        let mesh = self.mesh()?;
        if self.sequence_parallel && mesh.size_of("tp") == 1 {
            let why = format!(
                "--sequence-parallel splits norms and dropout over tp, and --mesh {} has no tp; leave it out, or add tp=2",
                self.mesh
            );
            return Err(Error::new(ErrorKind::Input, why));
        }
        let named = Pipeline::ALL
            .into_iter()
            .find(|p| p.name() == self.schedule);
        let pipeline = named.unwrap_or(Pipeline::ONE_F_ONE_B);
        let chunks = match (self.virtual_stages, self.schedule.as_str()) {
            (None, _) if pipeline.chunks() > 1 => pipeline.chunks(),
            (None, "interleaved") => 2,
            (n, _) => n.unwrap_or(1),
        };
        Ok(Setting {
            context: self.context.unwrap_or(model.context),
            micro_batch: match (self.micro_batch, self.mode.as_str()) {
                (Some(n), _) => n,
                (None, "decode") => {
                    let data = ["dp", "fsdp", "ep"].map(|axis| mesh.size_of(axis));
                    let own = self.global_batch / data.iter().product::<usize>();
                    // Exchanges of tokens run beside another micro-batch: those that serve mixtures have two.
                    let parts = match mesh.size_of("ep") > 1 && own >= 12 && own.is_multiple_of(2) {
                        true => 2,
                        false => 1,
                    };
                    (own / mesh.size_of("pp").max(parts)).max(1)
                }
                _ => 1,
            },
            pipeline,
            virtual_stages: chunks,
            recompute: match self.recompute.as_str() {
                "full" => Recompute::Full,
                "selective" => Recompute::Selective,
                _ => Recompute::None,
            },
            zero: self.zero,
            sequence_parallel: self.sequence_parallel,
            collective_matmul: self.collective_matmul,
            context_parallel: self.context_parallel(&mesh)?,
            dtype: self.dtype.clone(),
            ..Setting::new(model, mesh, self.global_batch)
        })
    }
}
