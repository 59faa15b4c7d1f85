//! TEMPORARY naive stand-in.
use crate::dtype::{Slice, SliceMut};
use half::{bf16,f16};
/// Heads of tokens, borrowed: element (b, h, t, d) is at b s0 + h s1 + t s2 + d.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads<'a> {
    pub(crate) data: Slice<'a>,
    pub(crate) strides: [usize; 3],
}

/// Heads of tokens, borrowed for writing; no two rows may overlap.
#[derive(Debug)]
pub(crate) struct HeadsMut<'a> {
    pub(crate) data: SliceMut<'a>,
    pub(crate) strides: [usize; 3],
}

/// What attends to what. Query t stands at position offset + t, key s at position s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry<'a> {
    /// Sequences.
    pub(crate) batch: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key heads; divides `heads`. Query head h uses key head h / (heads / kv_heads).
    pub(crate) kv_heads: usize,
    /// Queries of a sequence.
    pub(crate) queries: usize,
    /// Keys of a sequence.
    pub(crate) keys: usize,
    /// Elements of a head, 1 to 256.
    pub(crate) head_dim: usize,
    /// Logit = scale q.k.
    pub(crate) scale: f32,
    /// c: a logit l becomes c tanh(l / c), before masking.
    pub(crate) soft_cap: Option<f32>,
    /// Keys after the query are hidden.
    pub(crate) causal: bool,
    /// Keys at a distance of this or more are hidden; if `causal`, only earlier keys are left to hide.
    pub(crate) window: Option<usize>,
    /// Position of query 0.
    pub(crate) offset: usize,
    /// Document of each query `[batch, queries]` and key `[batch, keys]`: other documents' keys are hidden.
    pub(crate) documents: Option<(&'a [u32], &'a [u32])>,
}


fn get(s:&Slice,i:usize)->f64{match s{Slice::F32(x)=>x[i] as f64,Slice::Bf16(x)=>x[i].to_f64(),Slice::F16(x)=>x[i].to_f64(),_=>panic!()}}
fn set(s:&mut SliceMut,i:usize,v:f64){match s{SliceMut::F32(x)=>x[i]=v as f32,SliceMut::Bf16(x)=>x[i]=bf16::from_f64(v),SliceMut::F16(x)=>x[i]=f16::from_f64(v),_=>panic!()}}
fn sees(g:&Geometry,t:usize,s:usize)->bool{ !g.causal || s<=g.offset+t }
fn w(g:&Geometry,q:&Heads,k:&Heads,b:usize,h:usize,t:usize)->Vec<f64>{ let hk=h/(g.heads/g.kv_heads); (0..g.keys).map(|s| if sees(g,t,s){ (0..g.head_dim).map(|d| get(&q.data,b*q.strides[0]+h*q.strides[1]+t*q.strides[2]+d)*get(&k.data,b*k.strides[0]+hk*k.strides[1]+s*k.strides[2]+d)).sum::<f64>()*g.scale as f64} else {f64::NEG_INFINITY}).collect()}
pub(crate) fn attention_forward(g:&Geometry,q:Heads,k:Heads,v:Heads,mut o:HeadsMut,lse:&mut [f32]){
 for b in 0..g.batch{for h in 0..g.heads{let hk=h/(g.heads/g.kv_heads);for t in 0..g.queries{let l=w(g,&q,&k,b,h,t);let m=l.iter().cloned().fold(f64::NEG_INFINITY,f64::max);let z:f64=l.iter().map(|x|(x-m).exp()).sum();lse[(b*g.heads+h)*g.queries+t]=(m+z.ln()) as f32;
 for d in 0..g.head_dim{let y:f64=(0..g.keys).map(|s|if l[s]==f64::NEG_INFINITY{0.0}else{(l[s]-m).exp()/z*get(&v.data,b*v.strides[0]+hk*v.strides[1]+s*v.strides[2]+d)}).sum();set(&mut o.data,b*o.strides[0]+h*o.strides[1]+t*o.strides[2]+d,y);}}}}
}
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention_backward(g:&Geometry,q:Heads,k:Heads,v:Heads,o:Heads,dout:Heads,lse:&[f32],mut dq:HeadsMut,mut dk:HeadsMut,mut dv:HeadsMut){
 let dd=g.head_dim; let n=g.batch*g.kv_heads*g.keys*dd; let (mut ak,mut av)=(vec![0.0;n],vec![0.0;n]);
 for b in 0..g.batch{for h in 0..g.heads{let hk=h/(g.heads/g.kv_heads);for t in 0..g.queries{let l=w(g,&q,&k,b,h,t);let z=lse[(b*g.heads+h)*g.queries+t] as f64;
  let at=|x:&Heads,d:usize|get(&x.data,b*x.strides[0]+h*x.strides[1]+t*x.strides[2]+d);
  let di:f64=(0..dd).map(|d|at(&dout,d)*at(&o,d)).sum(); let mut aq=vec![0.0;dd];
  for s in 0..g.keys{ if l[s]==f64::NEG_INFINITY{continue} let p=(l[s]-z).exp(); let ix=((b*g.kv_heads+hk)*g.keys+s)*dd;
   let dp:f64=(0..dd).map(|d|at(&dout,d)*get(&v.data,b*v.strides[0]+hk*v.strides[1]+s*v.strides[2]+d)).sum(); let ds=p*(dp-di)*g.scale as f64;
   for d in 0..dd{av[ix+d]+=p*at(&dout,d); ak[ix+d]+=ds*at(&q,d); aq[d]+=ds*get(&k.data,b*k.strides[0]+hk*k.strides[1]+s*k.strides[2]+d);} }
  for d in 0..dd{set(&mut dq.data,b*dq.strides[0]+h*dq.strides[1]+t*dq.strides[2]+d,aq[d]);}}}}
 for b in 0..g.batch{for h in 0..g.kv_heads{for s in 0..g.keys{for d in 0..dd{let ix=((b*g.kv_heads+h)*g.keys+s)*dd+d; set(&mut dk.data,b*dk.strides[0]+h*dk.strides[1]+s*dk.strides[2]+d,ak[ix]);set(&mut dv.data,b*dv.strides[0]+h*dv.strides[1]+s*dv.strides[2]+d,av[ix]);}}}}
}
pub(crate) fn attention_scratch(_:&Geometry)->(usize,usize){(0,0)}
