//! The same tables on a graphics processor: same cases, same bounds.

use super::harness::{on_gpu, on_gpu_as};
use super::{attention, elementwise, loss, matmul, mixture, norms, optimizer, shapes, special};
use crate::gpu::Class;

/// Tests of the same name that run on the first graphics processor.
macro_rules! the_same {
    ($($room:ident::$case:ident),* $(,)?) => {
        $(#[test]
        #[cfg_attr(no_adapter, ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one")]
        fn $case() {
            on_gpu($room::$case);
        })*
    };
}

/// Tests that run once more with kernels as a card has them: tiles through workgroup memory, attention row by row.
macro_rules! the_same_as_on_a_card {
    ($($name:ident $room:ident::$case:ident),* $(,)?) => {
        $(#[test]
        #[cfg_attr(no_adapter, ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one")]
        fn $name() {
            on_gpu_as(Class::Discrete, $room::$case);
        })*
    };
}

the_same_as_on_a_card! {
    layouts_by_tiles matmul::every_layout_once,
    long_sums_by_tiles matmul::long_sums,
    masks_by_rows attention::every_mask_once,
    keys_in_parts attention::few_rows_over_many_keys,
}

the_same! {
    attention::every_mask_in_every_type,
    attention::sizes_at_the_edges,
    attention::few_rows_over_many_keys,
    attention::the_largest_head,
    attention::one_key_head_stays_whole_while_query_heads_are_split,
    elementwise::sums_and_products,
    elementwise::multiples,
    elementwise::casts_go_and_come_back,
    elementwise::biases_of_one_axis_and_of_more,
    elementwise::activations,
    elementwise::swiglu,
    elementwise::dropout_belongs_to_the_whole_tensors_elements,
    loss::on_a_whole_vocabulary,
    loss::on_a_vocabulary_in_parts,
    loss::the_three_ops_give_the_bits_of_the_one,
    loss::counts_and_means,
    matmul::products_of_every_type,
    matmul::products_at_the_edges_of_tiles,
    matmul::products_by_fours_across_tiles,
    matmul::long_sums,
    matmul::either_side_transposed_and_batched,
    matmul::bias_and_activation,
    matmul::the_result_has_the_type_that_is_asked_for,
    mixture::sigmoids,
    mixture::routes,
    mixture::slots_within_a_capacity,
    mixture::slots_are_filled_in_the_order_of_the_text,
    mixture::tokens_go_to_experts,
    mixture::and_come_back,
    mixture::uneven_loads_cost,
    mixture::a_loss_joins_whatever_passes,
    mixture::heads_join_what_they_share,
    mixture::zeros_around,
    norms::layer_norm,
    norms::rms_norm_over_rows_and_heads,
    norms::softmax,
    special::activations_have_their_limits,
    special::norms_cover_the_whole_range,
    special::softmax_of_ends,
    optimizer::adamw_follows_the_textbook,
    optimizer::sgd_follows_the_textbook,
    optimizer::a_factor_that_is_not_finite_changes_nothing,
    optimizer::clipping,
    shapes::embeddings_and_parts_of_them,
    shapes::rotary_positions,
    shapes::rotary_positions_of_documents,
    shapes::transposes,
    shapes::slices_and_what_they_join_to,
    shapes::concatenations,
    shapes::sums_over_everything,
}
